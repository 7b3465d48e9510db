"""Other file systems over the same lake, installed from packages: for `sluice bench --peers`."""
