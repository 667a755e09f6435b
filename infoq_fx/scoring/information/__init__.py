"""Mutual information: where it is measured, how it is estimated, and encoders of the inputs."""
