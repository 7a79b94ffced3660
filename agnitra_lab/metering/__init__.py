"""Metering: measured rates and a price in, a UsageEvent out, and a ledger that takes each event once."""
