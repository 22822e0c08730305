"""A detector trained on the DCNv2 paper's ladder."""
