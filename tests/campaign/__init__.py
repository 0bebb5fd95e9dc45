"""The campaign against inputs that are not trusted and moments that are not chosen: fuzz, kills,
full disks, races, little memory, other machines. A part of it runs with the tests; all of it, as
long as one likes, by ``python -m tests.campaign`` (docs/campaign.md)."""
