"""Export, quantize and check ONNX models for onnxruntime."""
