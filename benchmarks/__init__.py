"""Benchmarks of speed and quality that take longer than a test."""
