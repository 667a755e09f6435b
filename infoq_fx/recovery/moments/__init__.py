"""What enters a layer as rows that its weight multiplies, and their second moments."""
