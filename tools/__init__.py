"""What operators run by hand, above the predictor's level; nothing of the product imports it."""
