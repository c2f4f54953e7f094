"""A trained model leaves lumen: merged weights, GGUF files, a Modelfile."""
