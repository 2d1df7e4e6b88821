"""What each noun of the command line accepts; one module per noun."""
