"""Real training: transformers and peft live here and nowhere else."""
