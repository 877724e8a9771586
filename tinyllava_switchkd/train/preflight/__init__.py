"""What is known before weights are read: mistakes, shapes, memory."""
