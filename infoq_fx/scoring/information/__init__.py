"""Mutual information: observers, estimators and encoders of the inputs."""
