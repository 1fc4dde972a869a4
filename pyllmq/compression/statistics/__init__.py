"""What calibration learns of a model: block after block, the inputs of its Linears, and what its loss minds."""
