"""Tables and plots for bench, evaluation and training."""
