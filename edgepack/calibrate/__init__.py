"""Measuring on text what matters in a model: importance of columns, moments, cost of each tensor's error."""
