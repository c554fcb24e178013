"""clipgraft and its peers on one GPU, with ViT-B-32 at full size; `python -m benchmarks.gpu`."""
