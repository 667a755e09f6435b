"""Export of QDQ ONNX files in steps: trace, lower, finish, slim, write, check."""
