"""LoRA itself: layers, fused attention, attaching, and the choice of sites."""
