"""What runs look like afterwards: a text table and a self-contained HTML page, from run folders only."""
