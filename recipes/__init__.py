"""Training objectives (one term per file), rollouts, and the YAML recipes that combine them."""
