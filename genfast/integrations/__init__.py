"""Other libraries' doors into genfast; each imports its peer lazily."""
