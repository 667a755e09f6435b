"""From a quantized module to ONNX IR, with placeholder ops for what is written in the form that a target takes."""
