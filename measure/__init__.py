"""Every script that prints a figure or a verdict, run by hand; what they found is in LOG.md. tests/ is pytest only."""
