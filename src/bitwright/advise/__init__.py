"""What a model takes, and what is worth doing to it: memory forecasts, recommendations, bits under a budget."""
