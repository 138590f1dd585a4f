"""The only doors to durable state."""
