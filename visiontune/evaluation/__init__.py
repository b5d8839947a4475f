"""Metrics, and scoring of whole folders."""
