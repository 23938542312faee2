"""What `inspect` tells of a bundle's graph: layer by layer, tensor by tensor, and as a picture; reads no weights."""
