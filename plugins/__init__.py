"""The fused op `nemotron::PartialRopeAttention`: what it means, and each backend's form of it."""
