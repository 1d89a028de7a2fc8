"""Writing models for other programs: our own ONNX graphs, the web page, the checks that they agree."""
