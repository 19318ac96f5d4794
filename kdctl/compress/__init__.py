"""What makes a trained model smaller or faster: a table, one file a stage."""

COMPRESSORS = {
    "prune": ("prune:Prune", "fewer channels, heads and hidden units, by importance, under a budget"),
    "prune_heads": ("prune_heads:PruneHeads", "fewer attention heads and feed-forward units of a transformer"),
    "low_rank": ("low_rank:LowRank", "layers as chains of smaller ones: SVD, Tucker-2, CP"),
    "drop_layers": ("drop_layers:DropLayers", "whole residual or transformer blocks, by what they change"),
    "sparsify": ("sparsify:Sparsify", "the smallest weights become zero, free or N of every M"),
    "quantize": ("quantize:Quantize", "fewer bits a number: int8, int4, fp16, bf16, for any exporter's runtime"),
}
