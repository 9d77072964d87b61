"""Renders result documents for people, pipes and pages. Knows documents, and nothing of models."""
