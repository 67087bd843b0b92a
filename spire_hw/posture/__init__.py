"""What is known about a machine, and what policy makes of it. Pure: values in, a verdict out."""
