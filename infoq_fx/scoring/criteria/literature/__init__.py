"""Criteria that other papers propose, one per file."""
