"""Mutual information by brute force."""

import math

import numpy as np
from scipy.special import digamma


def distance_matrix(values):
    """Distances in standard deviations; rounding makes distances equal that are equal on paper."""
    values = np.asarray(values, np.float64)
    return np.round(np.abs(values[:, None] - values) / np.std(values), 10)


def ksg_by_brute_force(x, y, k, handle_ties=True):
    dx, dy = distance_matrix(x), distance_matrix(y)
    joint, terms = np.maximum(dx, dy), []
    for i, row in enumerate(joint):
        radius = np.sort(np.delete(row, i))[k - 1]
        if radius == 0 and handle_ties:
            copies, x_copies, y_copies = (np.sum(d[i] == 0) for d in (joint, dx, dy))
            terms.append(digamma(copies) - digamma(x_copies) - digamma(y_copies))
        else:
            inside, x_inside, y_inside = (np.sum(np.delete(d[i], i) < radius) + 1 for d in (joint, dx, dy))
            terms.append(digamma(inside if handle_ties else k) - digamma(x_inside) - digamma(y_inside))
    return digamma(len(joint)) + np.mean(terms)


def ross_by_brute_force(x, labels, k, handle_ties=True):
    sizes = {c: np.sum(labels == c) for c in set(labels.tolist())}
    kept = np.array([sizes[c] > 1 for c in labels.tolist()])
    distances, labels, terms = distance_matrix(x)[kept][:, kept], labels[kept], []
    for i, row in enumerate(distances):
        others = np.arange(len(row)) != i
        mates = others & (labels == labels[i])
        k_class = min(k, mates.sum())
        radius = np.sort(row[mates])[k_class - 1]
        if radius == 0 and handle_ties:
            same, overall = np.sum(row[mates] == 0) + 1, np.sum(row == 0)
        else:
            same = np.sum(row[mates] < radius) + 1 if handle_ties else k_class
            overall = np.sum(row[others] < radius) + 1
        terms.append(digamma(same) - digamma(mates.sum() + 1) - digamma(overall))
    return digamma(len(labels)) + np.mean(terms)


def correlated_normals(rho, slices, samples, seed=0):
    x, noise = np.random.default_rng(seed).standard_normal((2, slices, samples))
    return x, rho * x + math.sqrt(1 - rho**2) * noise
