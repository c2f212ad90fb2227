"""The mathematics and the engine: tensors, losses, models, generation, training; knows no world."""
