"""QDQ ONNX files: trace, lower, slim, finish, check, write."""
