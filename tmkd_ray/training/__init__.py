"""The training loop and what it trains: students, visual teachers, CLIP. No Ray in here."""
