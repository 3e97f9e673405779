"""What every other package stands on: errors, schemas, records, seeding, distribution."""
