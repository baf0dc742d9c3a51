"""Semantic IDs: quantizers, collision resolvers, the SID table and its scores."""
