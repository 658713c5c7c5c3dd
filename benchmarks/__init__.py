"""How fast, and how well: measurements that take longer than a test."""
