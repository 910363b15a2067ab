"""What commands show: tables, bars, startup steps, statistics, generated text."""
