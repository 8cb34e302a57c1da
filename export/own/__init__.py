"""Networks of users' own, and ONNX files of others: what is stated, what is measured."""
