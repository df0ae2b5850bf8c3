"""Correcting a network after compression, without data or from unlabelled inputs."""
