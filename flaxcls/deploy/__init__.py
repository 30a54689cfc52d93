"""What a trained run does: predict, explain, export, serve, learn a new class."""
