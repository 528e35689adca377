"""Building blocks of schedules: staleness and its discounts, weights of clients, and the draw of idle clients. No schedule."""
