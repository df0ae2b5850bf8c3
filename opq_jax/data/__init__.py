"""Images from TensorFlow Datasets."""
