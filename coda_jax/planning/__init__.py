"""What a program needs of a TPU pod, from its compiler, on a machine without a TPU."""
