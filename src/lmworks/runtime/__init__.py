"""Running a model: torch or ONNX Runtime behind one protocol, one generation loop over both. Numpy in, numpy out."""
