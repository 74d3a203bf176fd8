"""How much the loss minds: Fisher probe and predicted cost."""
