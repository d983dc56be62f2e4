"""TF Serving: files for its container image, and a client that sends videos."""
