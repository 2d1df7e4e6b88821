"""What several suites of tests need."""
