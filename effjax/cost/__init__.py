"""What a computation costs: FLOPs from its jaxpr, bytes, memory, time, energy, carbon."""
