"""What a model takes, and what is worth doing to it: memory forecasts, recommendations. Nothing here reads a weight."""
